"""Grouped matmul for the CPU: whole blocks of rows, one after another, each one plain matmul.

Group by group, a loop of as many blocks as the group needs. A block may run past its group's end
into rows of the next; those rows are wrong until the next group, which comes later, writes them
again. So nothing is masked but the rows past the last group.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK_ROWS = 128


@jax.custom_vjp
def grouped_matmul_cpu(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `moejax.ops.grouped_matmul.grouped_matmul`."""
    return _multiply(lhs, rhs, group_sizes, contract_last=False)


def _forward(lhs, rhs, group_sizes):
    # Only the operands are kept: no block of gathered weights outlives its own matmul.
    return grouped_matmul_cpu(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(saved, d_out):
    lhs, rhs, group_sizes = saved
    d_lhs = _multiply(d_out, rhs, group_sizes, contract_last=True)
    d_rhs = _outer(lhs, d_out, group_sizes).astype(rhs.dtype)
    return d_lhs, d_rhs, None


grouped_matmul_cpu.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="contract_last")
def _multiply(x_RK, w_EKN, group_sizes, *, contract_last: bool):
    """Rows of each group times its matrix, or (contract_last) times its transpose."""
    num_rows = x_RK.shape[0]
    block = min(BLOCK_ROWS, num_rows)
    num_out = w_EKN.shape[1 if contract_last else 2]
    padded = jnp.pad(x_RK, ((0, block), (0, 0)))
    dims = (((1,), (1 if contract_last else 0,)), ((), ()))

    def group(out, operands):
        w_KN, start, size = operands

        def one_block(i, out):
            row = start + i * block
            x = jax.lax.dynamic_slice_in_dim(padded, row, block)
            y = jax.lax.dot_general(x, w_KN, dims, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), row, 0)

        return jax.lax.fori_loop(0, -(-size // block), one_block, out), None

    ends = jnp.cumsum(group_sizes)
    out = jnp.zeros((num_rows + block, num_out), x_RK.dtype)
    out, _ = jax.lax.scan(group, out, (w_EKN, ends - group_sizes, group_sizes))
    return jnp.where(jnp.arange(num_rows)[:, None] < ends[-1], out[:num_rows], 0)


@jax.jit
def _outer(x_RK, y_RN, group_sizes):
    """Per group, the sum over its rows of x[r] y[r]^T: [E, K, N] float32."""
    block = min(BLOCK_ROWS, x_RK.shape[0])
    x_pad = jnp.pad(x_RK, ((0, block), (0, 0)))
    y_pad = jnp.pad(y_RN, ((0, block), (0, 0)))

    def group(_, operands):
        start, size = operands

        def one_block(i, total):
            x = jax.lax.dynamic_slice_in_dim(x_pad, start + i * block, block)
            y = jax.lax.dynamic_slice_in_dim(y_pad, start + i * block, block)
            mine = jnp.arange(block)[:, None] < size - i * block
            dims = (((0,), (0,)), ((), ()))
            x, y = jnp.where(mine, x, 0), jnp.where(mine, y, 0)
            return total + jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x_RK.shape[1], y_RN.shape[1]), jnp.float32)
        return None, jax.lax.fori_loop(0, -(-size // block), one_block, zeros)

    starts = jnp.cumsum(group_sizes) - group_sizes
    return jax.lax.scan(group, None, (starts, group_sizes))[1]
