"""Grouped matmul for the CPU: blocks of rows, one after another, each one plain matmul.

Group by group, as many blocks as the group needs, so the work is the rows' own plus less than a
block per group. A block is always a whole one, clamped into the array; the rows in it that belong
to other groups are computed in vain and left out when the result is written.
"""

from typing import Any

import jax
import jax.numpy as jnp

# Fewer rows make a matmul slow, more of them are too often another group's.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 32, 128

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


@jax.custom_vjp
def grouped_matmul_cpu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None = None
) -> jax.Array:
    """See `moejax.ops.grouped_matmul.grouped_matmul`."""
    return _multiply(lhs, rhs, group_sizes, rhs_dim=1)


def _forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None
) -> tuple[jax.Array, Saved]:
    # Only the operands are kept: no block outlives its own matmul.
    return _multiply(lhs, rhs, group_sizes, rhs_dim=1), (lhs, rhs, group_sizes, groups)


def _backward(saved: Saved, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    lhs, rhs, group_sizes, groups = saved
    d_lhs = _multiply(d_out, rhs, group_sizes, rhs_dim=2)
    d_rhs = _outer(lhs, d_out, group_sizes, groups).astype(rhs.dtype)
    return d_lhs, d_rhs, None, None


grouped_matmul_cpu.defvjp(_forward, _backward)


def _multiply(
    x_RK: jax.Array, w_EKN: jax.Array, group_sizes: jax.Array, *, rhs_dim: int
) -> jax.Array:
    """Each group's rows times its matrix, whose dim `rhs_dim` is summed over (2: transposed)."""
    num_rows = x_RK.shape[0]
    block = _block_rows(num_rows, w_EKN.shape[0])
    dims = (((1,), (rhs_dim - 1,)), ((), ()))
    accum = jnp.promote_types(x_RK.dtype, jnp.float32)

    def group(out: jax.Array, operands: Any) -> tuple[jax.Array, None]:
        _, start, end = operands
        # A group without rows is left out whole: cutting its matrix out of the stack copies it.
        return jax.lax.cond(end > start, rows_of, lambda out, *_: out, out, *operands), None

    def rows_of(out: jax.Array, index: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
        w_KN = jax.lax.dynamic_index_in_dim(w_EKN, index, keepdims=False)

        def one_block(i: jax.Array, out: jax.Array) -> jax.Array:
            row, mine = _place(start + i * block, end, num_rows, block)
            x = jax.lax.dynamic_slice_in_dim(x_RK, row, block)
            y = jax.lax.dot_general(x, w_KN, dims, preferred_element_type=accum)
            kept = jax.lax.dynamic_slice_in_dim(out, row, block)
            y = jnp.where(mine, y.astype(out.dtype), kept)
            return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

        return jax.lax.fori_loop(0, -(-(end - start) // block), one_block, out)

    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    starts = jnp.minimum(ends - group_sizes, ends)
    out = jnp.zeros((num_rows, w_EKN.shape[3 - rhs_dim]), x_RK.dtype)
    return jax.lax.scan(group, out, (jnp.arange(w_EKN.shape[0]), starts, ends))[0]


def _outer(
    x_RK: jax.Array, y_RN: jax.Array, group_sizes: jax.Array, groups: jax.Array | None
) -> jax.Array:
    """Per wanted group, the sum over its rows of x[r] y[r]^T: [E, K, N], float32 or wider."""
    num_rows, num_groups = x_RK.shape[0], group_sizes.shape[0]
    block = _block_rows(num_rows, num_groups)
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    starts = ends - group_sizes
    num_blocks = _num_wanted_blocks(ends - starts, groups, block)
    dims = (((0,), (0,)), ((), ()))
    accum = jnp.promote_types(x_RK.dtype, jnp.float32)

    def group(e: jax.Array, total: jax.Array) -> jax.Array:
        def one_block(i: jax.Array, total: jax.Array) -> jax.Array:
            row, mine = _place(starts[e] + i * block, ends[e], num_rows, block)
            # Both are masked: zero times what stands in a row of nobody's could be NaN.
            x = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x_RK, row, block), 0)
            y = jnp.where(mine, jax.lax.dynamic_slice_in_dim(y_RN, row, block), 0)
            product = jax.lax.dot_general(x, y, dims, preferred_element_type=accum)
            kept = jax.lax.dynamic_index_in_dim(total, e, 0, keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(total, kept + product, e, 0)

        return jax.lax.fori_loop(0, num_blocks[e], one_block, total)

    total = jnp.zeros((num_groups, x_RK.shape[1], y_RN.shape[1]), accum)
    return jax.lax.fori_loop(0, num_groups, group, total)


def _num_wanted_blocks(sizes: jax.Array, groups: jax.Array | None, block: int) -> jax.Array:
    """Blocks that each group takes, none where it is not wanted: [E]."""
    num_blocks = -(-sizes // block)
    return num_blocks if groups is None else jnp.where(groups, num_blocks, 0)


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Half a mean group, as a power of two within bounds, and never more than there are rows."""
    half = num_rows // (2 * num_groups)
    power = 1 << max(0, half - 1).bit_length()
    return min(num_rows, max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, power)))


def _place(
    first: jax.Array, end: jax.Array, num_rows: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Where a block meant for rows [first, end) is read, and which of its rows [block, 1] count."""
    row = jnp.minimum(first, num_rows - block)
    rows = row + jnp.arange(block)[:, None]
    return row, (rows >= first) & (rows < end)
